"""What TensorRT and TensorRT-RTX say, turned into one error with a subject and a next step.

The libraries report through parser errors, log lines and return values, with assertion texts and C++ source positions.
Everything else in this package sees an `EngineError` (the graph's or the recipe's fault) or an `MissingRequirementError` (the
machine's). The patterns were collected from TensorRT-RTX 1.7.1; TensorRT 10.14 and later share the importer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gap_export.engine.library import Message
from gap_export.errors import EngineError, GapExportError, MissingRequirementError

_SHOWN = 5
"""How many complaints one error quotes."""


@dataclass(frozen=True)
class Complaint:
    """One thing a library objects to.

    Attributes:
        text: of the message, without source positions that mean nothing outside the library.
        node: name of the ONNX node, or empty.
        operator: its operator, or empty.
        source: where in the library it arose, or empty.
    """

    text: str
    node: str = ""
    operator: str = ""
    source: str = ""

    def __str__(self) -> str:
        where = f"{self.node or 'unnamed node'} ({self.operator}): " if self.operator else ""
        return f"{where}{self.text}{f' [{self.source}]' if self.source else ''}"


@dataclass(frozen=True)
class _Rule:
    """What a text means.

    Attributes:
        pattern: searched in a complaint; a group `subject` names what it is about.
        hint: the next step.
        error: the kind of failure.
    """

    pattern: re.Pattern[str]
    hint: str
    error: type[GapExportError] = EngineError


def _rule(pattern: str, hint: str, error: type[GapExportError] = EngineError) -> _Rule:
    return _Rule(re.compile(pattern, re.IGNORECASE), hint, error)


_OUTSIDE = "weights must lie in the graph's own folder: place them there as hard links or copies"
_PROFILE = "the graph and its spec differ: build the bundle again from the checkpoint"

_RULES = (
    _rule(
        r"static sequence length dimension",
        "export the decoder with a fixed cache capacity: only the batch of a cache may vary",
    ),
    _rule(
        r"only supports Attention nodes with one output",
        "write the cache with TensorScatter; past and present inside Attention are not supported",
    ),
    _rule(
        r"K exceeds the maximum value allowed",
        "TopK takes at most 3840: keep fewer visual tokens, or choose a pruner that does not rank so many",
    ),
    _rule(
        r"Shape tensor Scan\S* is not initialized",
        "a loop whose number of rounds follows from the size of an image, as that of vispruner, cannot be built: choose another "
        "pruner, or run the graph in ONNX Runtime",
    ),
    _rule(
        r"must have same input types|has type \w+ but must have type|Found unsupported input type",
        "networks are strongly typed and nothing is converted on its own: put a Cast in front of the node",
    ),
    _rule(
        r"Relative paths to parent.*path is: (?P<subject>\S+)|absolute path.*?(?P<file>/\S+)",
        _OUTSIDE,
    ),
    _rule(r"Failed to open file: (?P<subject>\S+)", f"the file with the weights is missing; {_OUTSIDE}"),
    _rule(
        r"offset/length out of range for file: (?P<subject>\S+)",
        "the file with the weights was cut short: copy it again, or build the bundle again",
    ),
    _rule(
        r"Failed to parse the ONNX model|MODEL_DESERIALIZE_FAILED|convertOnnxWeights",
        "the file is damaged or cut short: build the bundle again",
    ),
    _rule(r"cannot be found, or is not a regular file", "build the bundle, or check the path"),
    _rule(
        r"not supported by a dedicated kernel",
        "half-precision attention needs head sizes from 16 to 256 (multiples of 8), 4 query heads or more",
    ),
    _rule(
        r"HW-specific datatypes|Cannot compile for target",
        "compute capability 7.5 has no bf16: leave it out, or build with --precision fp16",
    ),
    _rule(
        r"plugin registry|Plugin not found|UNSUPPORTED_NODE|No importer registered|checkUnique|unsupported op",
        "the operator has no importer: rewrite that part of the model with plain ONNX operators",
    ),
    _rule(
        r"out of memory|OutOfMemory|OUT_OF_MEMORY|bad_alloc|cudaError 2\b",
        "free memory, build on a larger machine, or lower --max-text, --capacity, or max_batch in the recipe",
        MissingRequirementError,
    ),
    _rule(
        r"(tensor|input tensor) (?P<subject>\S+) (and profile|has static dimensions|is missing dimensions)"
        r"|no optimization profile has been defined|is missing values for shape input",
        _PROFILE,
    ),
    _rule(
        r"compute capability|unsupported SM|not supported on (this|the) (GPU|device|architecture)",
        "list the GPU's compute capability in the recipe's compute_capabilities and build again",
    ),
    _rule(
        r"cudaError \d+|CUDA driver|no CUDA-capable device|CUDA initialization failure",
        "this needs an NVIDIA GPU with a current driver on the machine",
        MissingRequirementError,
    ),
)

# Every refusal on a machine without a GPU drags these along; they say nothing about the graph.
_NOISE = re.compile(
    r"\[checkMacros\.cpp::catchCudaError|^While parsing node|^--- (Begin|End) node|^Node name:", re.M
)
_POSITION = re.compile(r"\s*\bIn \w+(\(\))? at /\S+?:\d+\s*")
_PREFIX = re.compile(r"^(\S+\.(cpp|hpp|h):\d+: )?(ERROR: )?(I[A-Z]\w+::\w+: )?(Error Code \d+: )?")
_UNUSED = re.compile(
    r"Unused Input: (?P<a>.+?)\s*$|Input Tensor (?P<b>.+?) is unused or used only at compile-time"
)


def complaints_of_parser(parser: Any) -> list[Complaint]:
    """Every error an `OnnxParser` holds."""
    found = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        found.append(
            Complaint(
                text=_cleaned(error.desc()),
                node=error.node_name(),
                operator=error.node_operator(),
                source=f"{error.file()}:{error.line()}",
            )
        )
    return found


def complaints_of_log(messages: Sequence[Message]) -> list[Complaint]:
    """The error lines of a log, without those that only repeat a parser error or report that there is no GPU.

    A log with nothing but the latter keeps them: then the missing GPU is what is wrong.
    """
    errors = [message.text for message in messages if message.is_error]
    telling = [text for text in errors if not _NOISE.search(text.removeprefix("ModelImporter.cpp:140: "))]
    telling = [
        text for text in telling if "In function " not in text and not re.match(r"\S+\.cpp:14[0-3]: ", text)
    ]
    return [Complaint(text=_cleaned(text)) for text in telling or errors]


def unused_inputs(messages: Sequence[Message]) -> list[str]:
    """Names of inputs whose values the library found it does not need.

    It drops them with a warning. For `nonpad_kv_seqlen` of Attention or for `position_ids` that is a wrong answer at run
    time, so callers treat it as an error.
    """
    found = [match["a"] or match["b"] for message in messages if (match := _UNUSED.search(message.text))]
    return list(dict.fromkeys(found))


def error_from_complaints(
    complaints: Sequence[Complaint], *, subject: str, library: str, doing: str
) -> GapExportError:
    """One error for all complaints.

    Args:
        complaints: in the order of their arrival; the first one a rule recognises decides subject, hint and kind.
        subject: what the work was on, for when no complaint names anything narrower.
        library: title and version.
        doing: what failed, as in "could not {doing}".

    Returns:
        `MissingRequirementError` when the machine is at fault, else `EngineError`. Not raised here.
    """
    said = "; ".join(str(complaint) for complaint in complaints[:_SHOWN]) or "it gave no reason"
    if len(complaints) > _SHOWN:
        said += f"; and {len(complaints) - _SHOWN} more"
    for rule in _RULES:
        for complaint in complaints:
            match = rule.pattern.search(f"{complaint.text} {complaint.source}")
            if match:
                groups = match.groupdict()
                narrower = complaint.node or groups.get("subject") or groups.get("file")
                return rule.error(
                    f"{library} could not {doing}: {said}",
                    subject=_within(subject, narrower),
                    hint=rule.hint,
                )
    first = next((complaint for complaint in complaints if complaint.node), None)
    return EngineError(
        f"{library} could not {doing}: {said}",
        subject=_within(subject, first.node if first else None),
        hint="check the graph with `gap-export inspect`; if it runs in ONNX Runtime, please report this",
    )


def _within(subject: str, narrower: str | None) -> str:
    return f"{subject}, {narrower}" if narrower else subject


def _cleaned(text: str) -> str:
    """A library's message on one line, without positions in its sources and without the no-GPU noise."""
    lines = [line.strip() for line in text.splitlines()]
    telling = [line for line in lines if line and not _NOISE.search(line)] or lines
    telling = [_POSITION.sub("", _PREFIX.sub("", line)).strip(" .") for line in telling]
    return " ".join(line for line in telling if line)
