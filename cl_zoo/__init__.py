"""Continual learning in JAX: learner = model + optimiser + components.

Names are imported when they are first used. What is not here lies in a room of its own: `cl_zoo.losses`, `models`,
`wrappers`, `layers`, `language`, `datasets`, `streams`, `training`, `evaluation`, `metrics`, `plots`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
