"""Networks as a `Model`: perceptrons, convolutional nets, and what makes a model of a Flax module."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
