"""The conformance kit for those who port CLIP: `trace` records every stage of a forward pass, `compare` finds a port's
first wrong stage and the mistake that explains it.

Read rules.py (how each stage is computed), forward.py, trace.py, measure.py, compare.py, hints.py, diagnose.py and
mistakes/ (the catalogue). The stages' names and shapes are in each family's stages.py.
"""

from miniclip.conformance.compare import compare
from miniclip.conformance.files import TraceError, load_stages, load_trace, save_trace
from miniclip.conformance.report import Comparison
from miniclip.conformance.trace import trace

__all__ = ["Comparison", "TraceError", "compare", "load_stages", "load_trace", "save_trace", "trace"]
