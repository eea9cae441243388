"""Runs of a learner over a stream: as one compiled program, many at once, or from a host loop with checkpoints."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
