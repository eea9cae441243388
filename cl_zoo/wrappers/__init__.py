"""What makes a `Model` of another `Model`: adapters, episodes, learning rates, a second head."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
