"""The conformance kit, for those who port CLIP: every stage of a forward pass by name, and what a port's stages lack.

Read stages.py (the names), rules.py (their definitions), forward.py, trace.py, measure.py, compare.py, diagnose.py and
mistakes/ (the catalogue).
"""

from miniclip.conformance.compare import compare
from miniclip.conformance.files import TraceError, load_stages, load_trace, save_trace
from miniclip.conformance.report import Comparison
from miniclip.conformance.trace import trace

__all__ = ["Comparison", "TraceError", "compare", "load_stages", "load_trace", "save_trace", "trace"]
