from ._episodic import episodic as episodic
from ._lora import lora as lora
from ._lora import merge_adapters as merge_adapters
from ._lora import unmerge_adapters as unmerge_adapters
from ._mixed_precision import mixed_precision as mixed_precision
from .learning_rates import with_learning_rates as with_learning_rates
from .rotation_head import with_rotation_head as with_rotation_head
