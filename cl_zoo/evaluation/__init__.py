"""What a learner is worth: measures taken in a run, metrics of the accuracy matrix, probes, costs, figures."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
