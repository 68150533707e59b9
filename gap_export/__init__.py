"""gap-export: pruned multimodal decoders to ONNX and TensorRT, with their position ids intact.

    import gap_export as gap

    bundle = gap.build(gap.Recipe.load("shapes", keep=0.25), "out/shapes")
    with gap.load(bundle) as model:
        answer = model.ground("scene.png", "the small red circle")

Every public name stands here and is imported when it is first used: running a bundle needs neither torch nor transformers.
"""

from __future__ import annotations

import importlib
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gap_export import errors, positions
    from gap_export.bundle.folder import Bundle, open_bundle
    from gap_export.evaluation.calibrate import calibrate
    from gap_export.evaluation.latency.bench import bench
    from gap_export.evaluation.latency.fastest import fastest_backend
    from gap_export.evaluation.recommend.bundle import recommend
    from gap_export.evaluation.recommend.run import recommend_pruner
    from gap_export.evaluation.refer.compare import compare
    from gap_export.evaluation.refer.dataset import open_dataset
    from gap_export.evaluation.refer.evaluate import evaluate, evaluate_predictions
    from gap_export.evaluation.report.terminal import bundle_facts as inspect
    from gap_export.evaluation.report.write import report
    from gap_export.evaluation.sweep.run import sweep
    from gap_export.evaluation.validate import validate
    from gap_export.evaluation.validate_text import validate_text
    from gap_export.families.table import overview as models
    from gap_export.linter import lint_graph as lint
    from gap_export.pipeline.build import build_bundle as build
    from gap_export.pipeline.golden import add_golden
    from gap_export.recipe.recipe import Recipe
    from gap_export.runtime.conversation.chat import AskOptions, Chat, Reply, ReplyStream
    from gap_export.runtime.grounder import Answer
    from gap_export.runtime.model import Model, load
    from gap_export.serving.check_receipt import check_receipt
    from gap_export.serving.serve import serve

__version__ = "0.1.0"

IMPORTED_NS = time.time_ns()
"""When this process began to read the package: a source that was changed later may not be what runs."""

__all__ = [
    "Answer",
    "AskOptions",
    "Bundle",
    "Chat",
    "Model",
    "Recipe",
    "Reply",
    "ReplyStream",
    "__version__",
    "add_golden",
    "bench",
    "build",
    "calibrate",
    "check_receipt",
    "compare",
    "errors",
    "evaluate",
    "evaluate_predictions",
    "fastest_backend",
    "inspect",
    "lint",
    "load",
    "models",
    "open_bundle",
    "open_dataset",
    "positions",
    "recommend",
    "recommend_pruner",
    "report",
    "serve",
    "sweep",
    "validate",
    "validate_text",
]

# No module directly in this package has the name of a function: importing it would put the module in the function's place.
_DEFINED_IN = {
    "Answer": "runtime.grounder:Answer",
    "AskOptions": "runtime.conversation.chat:AskOptions",
    "Bundle": "bundle.folder:Bundle",
    "Chat": "runtime.conversation.chat:Chat",
    "Model": "runtime.model:Model",
    "Recipe": "recipe.recipe:Recipe",
    "Reply": "runtime.conversation.chat:Reply",
    "ReplyStream": "runtime.conversation.chat:ReplyStream",
    "add_golden": "pipeline.golden:add_golden",
    "bench": "evaluation.latency.bench:bench",
    "build": "pipeline.build:build_bundle",
    "calibrate": "evaluation.calibrate:calibrate",
    "check_receipt": "serving.check_receipt:check_receipt",
    "compare": "evaluation.refer.compare:compare",
    "errors": "errors",
    "evaluate": "evaluation.refer.evaluate:evaluate",
    "evaluate_predictions": "evaluation.refer.evaluate:evaluate_predictions",
    "fastest_backend": "evaluation.latency.fastest:fastest_backend",
    "inspect": "evaluation.report.terminal:bundle_facts",
    "lint": "linter:lint_graph",
    "load": "runtime.model:load",
    "models": "families.table:overview",
    "open_bundle": "bundle.folder:open_bundle",
    "open_dataset": "evaluation.refer.dataset:open_dataset",
    "positions": "positions",
    "recommend": "evaluation.recommend.bundle:recommend",
    "recommend_pruner": "evaluation.recommend.run:recommend_pruner",
    "report": "evaluation.report.write:report",
    "serve": "serving.serve:serve",
    "sweep": "evaluation.sweep.run:sweep",
    "validate": "evaluation.validate:validate",
    "validate_text": "evaluation.validate_text:validate_text",
}


def __getattr__(name: str) -> Any:
    """A public name, imported when it is first used.

    Raises:
        MissingRequirementError: it takes packages that are not installed.
    """
    if name not in _DEFINED_IN:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _DEFINED_IN[name].partition(":")
    try:
        found = importlib.import_module(f"{__name__}.{module}")
    except ImportError as error:
        from gap_export.environment import missing_package

        raise missing_package(error, f"gap_export.{name}") from error
    value = getattr(found, attribute) if attribute else found
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
