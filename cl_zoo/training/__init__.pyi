from ._fit import Stopped as Stopped
from ._fit import fit as fit
from ._run_stream import clear_programs as clear_programs
from ._run_stream import run_stream as run_stream
from ._run_stream import stream_program as stream_program
from ._run_stream import sweep as sweep
from .loop import NonFiniteError as NonFiniteError
from .loop import Result as Result
