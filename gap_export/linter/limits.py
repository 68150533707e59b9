"""What lint does at most with one graph: a graph is anybody's file, and a kilobyte of it can ask for years and terabytes.

Limits are far above what decoders have; each is said by name where it is met.
"""

from __future__ import annotations

from gap_export.errors import LintError

MOST_FIELDS = 3_000_000
"""Fields of the protobuf file; each takes some hundred bytes of memory, though two of the file may do."""
FIELDS_FIT = 2**20
"""Bytes of a file that is not counted before it is read: so many cannot hold more fields than memory takes easily."""
MOST_NODES = 100_000
"""With those of bodies, and with functions expanded."""
MOST_INPUTS = 10_000
DEEPEST_BODIES = 32
"""If, Loop and Scan within each other; a protobuf file cannot hold more, a model in memory can."""
DEEPEST_CALLS = 64
"""Functions that call functions."""
MOST_WORK = 3_000_000
"""Steps of walking through the graph; evaluated nodes count as some."""
NODE_WORK = 15
"""Steps that evaluating one node counts as, apart from what it computes."""
MOST_EVALUATED_BYTES = 2**29
"""Of all results of one evaluation together."""
MOST_FED = 2**26
"""Elements of one input that is made up for an evaluation or a run."""
PROOF_SECONDS = 8.0
"""Of loading a graph in ONNX Runtime, and of one run; graphs with weights have more."""
PROOF_BYTES = 2 * 2**30
"""Of ONNX Runtime's memory, beside some times the weights."""

_HINT = "no decoder is known that needs so much: check the file with onnx.checker and export it again"


def too_much(message: str, subject: str) -> LintError:
    """The refusal of a graph that passes a limit."""
    return LintError(message, subject=subject, hint=_HINT)


class Work:
    """What has been done for one graph.

    Args:
        subject: the graph, for the message.
    """

    def __init__(self, subject: str) -> None:
        self._subject, self._left = subject, MOST_WORK

    def take(self, steps: int = 1) -> None:
        """Count so many steps.

        Raises:
            LintError: it was too much.
        """
        self._left -= steps
        if self._left < 0:
            raise too_much(f"takes more than {MOST_WORK} steps to analyse", self._subject)
