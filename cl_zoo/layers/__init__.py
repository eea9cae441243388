"""Layers that mix tokens over time, in a parallel and a recurrent form."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
