"""Harmless calls of every command: hostile inputs are made of them, and held against them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from tests.hostile.commands import Parameter


@dataclass(frozen=True)
class Call:
    """A command line that is accepted, in a folder with what it needs: what hostile ones are held against.

    Attributes:
        command: first word.
        arguments: by place.
        options: flag -> its value, all of its values, or True for a switch.
        needs: entries of the prepared files that it reads.
        makes: patterns of paths that it may make, also where it ends with a refusal half way.
        rewrites: patterns of paths that it may change or remove.
        further: words at the end of the line.
        label: tells calls of one command apart.
    """

    command: str
    arguments: tuple[str, ...] = ()
    options: dict[str, str | tuple[str, ...] | bool] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    makes: tuple[str, ...] = ()
    rewrites: tuple[str, ...] = ()
    further: tuple[str, ...] = ()
    label: str = ""

    @property
    def name(self) -> str:
        """Unique."""
        return f"{self.command} {self.label}".strip()

    @property
    def line(self) -> tuple[str, ...]:
        """Words after `gap-export`."""
        words = [self.command, *self.arguments]
        for flag, value in self.options.items():
            if value is True:
                words.append(flag)
            else:
                for each in value if isinstance(value, tuple) else (value,):
                    words += [flag, str(each)]
        return (*words, *self.further)

    @property
    def builds(self) -> bool:
        """Whether graphs are traced for it."""
        return "--model" in self.options

    def given(self, parameter: Parameter, value: str) -> Call:
        """The same with another value of an option or argument."""
        if not parameter.is_argument:
            return replace(self, options={**self.options, parameter.flag: value})
        place = _PLACES.get(parameter.name, 0)
        arguments = list(self.arguments) or [value]
        arguments[place] = value
        return replace(self, arguments=tuple(arguments))


_PLACES = {
    "compare subject": 1,
    "ask question": 1,
    "check-receipt receipt": 1,
    "check-receipt images": 2,
}

_OPENVINO: dict[str, Any] = {"--backend": "openvino", "--device": "cpu", "--precision-hint": "f32"}
_PROVIDER = {"--provider": "CPUExecutionProvider"}
_ONE = {"--threads": "1"}
_BUILD = ("recipe.yaml", "checkpoint", "tower")
_RUN = ("bundle", "image.png")
_EVAL = {"--data": "scenes:3", "--limit": "6", **_ONE}
_RUNS = ("bundle.runs/*", "dynamic.runs/*")
_GOLDEN = ("bundle/golden.*",)
_ANNOTATED = ("bundle", "annotations", "images")


def _build(label: str, *needs: str, model: str = "recipe.yaml", **options: Any) -> Call:
    given = {"--model": model, "--output": "out", "--no-golden": True} | {
        f"--{name.replace('_', '-')}": value for name, value in options.items()
    }
    return Call("build", (), given, (*_BUILD, *needs), ("out", "out/*"), label=label)


def _run(
    label: str, *needs: str, bundle: str = "bundle", makes: tuple[str, ...] = (), **options: Any
) -> Call:
    given = {"--image": "image.png", "--refer": "the red mug", **_ONE} | {
        f"--{name.replace('_', '-')}": value for name, value in options.items()
    }
    return Call("run", (bundle,), given, (bundle, "image.png", *needs), makes, label=label)


def _ask(
    label: str, *needs: str, bundle: str = "talking", makes: tuple[str, ...] = (), **options: Any
) -> Call:
    given = {"--image": "image.png", **_ONE} | {
        f"--{name.replace('_', '-')}": value for name, value in options.items()
    }
    given = {flag: value for flag, value in given.items() if value is not None}
    return Call(
        "ask", (bundle, "where is the red mug ?"), given, (bundle, "image.png", *needs), makes, label=label
    )


def _eval(label: str, *needs: str, makes: tuple[str, ...] = ("out", "out/*"), **options: Any) -> Call:
    """Options that are None are left out."""
    given: dict[str, Any] = {**_EVAL, "--output": "out"}
    for name, value in options.items():
        given[f"--{name.replace('_', '-')}"] = value
    given = {flag: value for flag, value in given.items() if value is not None}
    return Call("eval", ("bundle",), given, ("bundle", *needs), makes, label=label)


def _data(name: str) -> Call:
    """An evaluation of annotations in one of the formats."""
    data = f"annotations/{name}"
    return _eval(name, "annotations", "images", data=data, images="images", limit=None)


CALLS: tuple[Call, ...] = (
    Call("models"),
    Call("models", (), {"--json": True}, label="--json"),
    _build(""),
    _build("--json", json=True, keep="0.25", pruner="divprune", seed="3", positions="shifted"),
    _build("range", keep="0.1:0.3:1.0", merged_id="last_visual", max_new_tokens="4", self_contained=True),
    _build("adaptive", keep="adaptive", keep_bound="0.5", pruner="prumerge"),
    _build("capacity", capacity="80", max_new_tokens="4"),
    _build("lengths", max_text="40", max_new_tokens="4", box_format="list_pixels"),
    _build("text", pruner="text_similarity", text_tower="tower", checkpoint="checkpoint"),
    _build("weights", weights="checkpoint", target="onnx", precision="fp32", prune_layers=()),
    _build("fp8", "ranges.json", precision="fp8", ranges="ranges.json"),
    _build("calibration", "calibration.txt", precision="int4", calibration="calibration.txt"),
    _build("sharded", "sharded", checkpoint="sharded"),
    _build("folder", model="checkpoint"),
    _build("chat", "spoken", model="spoken", max_text="60", max_new_tokens="4"),
    _build(
        "chat text",
        "spoken",
        checkpoint="spoken",
        pruner="text_similarity",
        text_tower="tower",
        keep="0.1:0.3:1.0",
        max_text="60",
    ),
    Call(
        "build",
        (),
        {
            "--model": "recipe.yaml",
            "--output": "bundle",
            "--keep": "0.25",
            "--no-golden": True,
            "--replace": True,
        },
        (*_BUILD, "bundle"),
        ("bundle/*",),
        ("bundle/*",),
        label="--replace",
    ),
    Call(
        "calibrate",
        ("bundle",),
        {
            "--output": "found.json",
            "--limit": "3",
            "--backend": "onnxruntime",
            "--device": "cpu",
            **_PROVIDER,
            **_ONE,
        },
        ("bundle",),
        ("found.json",),
    ),
    Call(
        "calibrate",
        ("bundle",),
        {
            "--output": "ranges.json",
            "--limit": "3",
            "--data": "annotations/minigpt4.json",
            "--images": "images",
            "--split": "val",
            "--json": True,
            **_ONE,
        },
        (*_ANNOTATED, "ranges.json"),
        rewrites=("ranges.json",),
        label="--data",
    ),
    Call(
        "validate",
        ("bundle",),
        {"--limit": "2", "--batch": "2", "--checkpoint": "checkpoint", **_PROVIDER, **_ONE},
        ("bundle", "checkpoint"),
        ("bundle/reports", "bundle/reports/*"),
        ("bundle/reports/*",),
    ),
    Call(
        "validate",
        ("worded",),
        {"--limit": "1", "--checkpoint": "checkpoint", "--text-tower": "tower", **_ONE},
        ("worded", "checkpoint", "tower"),
        ("worded/reports", "worded/reports/*"),
        ("worded/reports/*",),
        label="--text-tower",
    ),
    Call(
        "validate",
        ("dynamic",),
        {"--limit": "1", "--keep": "0.5", "--json": True, **_OPENVINO, **_ONE},
        ("dynamic",),
        ("dynamic/reports", "dynamic/reports/*"),
        ("dynamic/reports/*",),
        label="--keep",
    ),
    Call(
        "validate",
        ("dynamic",),
        {"--text": "prose.txt", "--tokens": "32", **_ONE},
        ("dynamic", "prose.txt"),
        ("dynamic/reports", "dynamic/reports/*"),
        ("dynamic/reports/*",),
        label="--text",
    ),
    _run(""),
    _run("--json", json=True, max_new_tokens="3", backend="openvino", device="cpu", precision_hint="f32"),
    _run("--draw", makes=("drawn.png",), draw="drawn.png", provider="CPUExecutionProvider"),
    _run("--keep", bundle="dynamic", keep="0.5"),
    _run("--box-format", box_format="bbox_1000"),
    _run("torch", "checkpoint", backend="torch"),
    _ask(""),
    _ask(
        "--json",
        json=True,
        max_new_tokens="3",
        temperature="0.5",
        top_p="0.9",
        top_k="5",
        min_p="0.1",
        repetition_penalty="1.1",
        seed="3",
        stop=("mug", "cat"),
        system="the mug is red",
        backend="openvino",
        device="cpu",
        precision_hint="f32",
    ),
    _ask(
        "--draw",
        makes=("drawn.png",),
        draw="drawn.png",
        stream=True,
        box_format="bbox_1000",
        provider="CPUExecutionProvider",
    ),
    _ask("--no-image", image=None, no_image=True),
    _ask("several", image=("image.png", "image.png")),
    _ask("--focus", bundle="reading", focus="the red mug", keep="0.5"),
    Call(
        "bench",
        ("bundle",),
        {"--requests": "1", "--new-tokens": "1", "--no-memory": True, **_PROVIDER, **_ONE},
        ("bundle",),
        ("bundle/reports", "bundle/reports/*"),
        ("bundle/reports/*",),
    ),
    Call(
        "bench",
        ("dynamic",),
        {
            "--requests": "1",
            "--new-tokens": "1",
            "--no-memory": True,
            "--keep": "1.0,0.5",
            "--batch": "1,2",
            "--against": "torch",
            **_OPENVINO,
            "--json": True,
            **_ONE,
        },
        ("dynamic", "checkpoint"),
        ("dynamic/reports", "dynamic/reports/*"),
        ("dynamic/reports/*",),
        label="--keep",
    ),
    Call(
        "sweep",
        (),
        {
            "--model": "recipe.yaml",
            "--pruners": "divprune",
            "--keep": "0.25",
            "--positions": "gap",
            "--limit": "2",
            "--batch": "2",
            "--workers": "1",
            "--no-plot": True,
            "--output": "swept",
            **_OPENVINO,
            **_ONE,
        },
        _BUILD,
        ("swept", "swept/*"),
    ),
    Call(
        "sweep",
        (),
        {
            "--model": "recipe.yaml",
            "--pruners": "divprune",
            "--keep": "0.25",
            "--positions": "gap",
            "--limit": "2",
            "--workers": "1",
            "--output": "sweep",
            "--replace": True,
            "--json": True,
            **_PROVIDER,
            **_ONE,
        },
        (*_BUILD, "sweep"),
        ("sweep/*",),
        ("sweep/*",),
        label="finished",
    ),
    _eval(""),
    _eval(
        "--json",
        json=True,
        rows="2",
        one_by_one=True,
        protocol="lmms-eval",
        backend="openvino",
        device="cpu",
        precision_hint="f32",
        skip_bad_rows=True,
        rescale_boxes=True,
        ignore_exif=True,
    ),
    Call(
        "eval",
        ("dynamic",),
        {**_EVAL, "--keep": "0.5"},
        ("dynamic",),
        ("dynamic.runs", *_RUNS),
        label="--keep",
    ),
    Call(
        "eval",
        ("bundle",),
        {**_EVAL, "--output": "one"},
        ("bundle", "one"),
        ("one/*",),
        ("one/*",),
        label="again",
    ),
    Call(
        "eval",
        ("bundle",),
        {**_EVAL, "--data": "scenes:2", "--output": "one", "--replace": True},
        ("bundle", "one"),
        ("one/*",),
        ("one/*",),
        label="--replace",
    ),
    _data("minigpt4.json"),
    _data("shikra.jsonl"),
    _eval("--provider", provider="CPUExecutionProvider"),
    _data("internvl.jsonl"),
    _data("mdetr.json"),
    _eval(
        "refer", "annotations", "images", data="annotations/refer", split="val", images="images", limit=None
    ),
    _eval("parquet", "annotations", data="annotations/parquet", split="val", limit=None),
    Call(
        "eval",
        (),
        {
            "--data": "annotations/minigpt4.json",
            "--predictions": "predictions.jsonl",
            "--family": "llava",
            "--output": "out",
        },
        ("annotations", "predictions.jsonl"),
        ("out", "out/*"),
        label="--predictions",
    ),
    Call(
        "eval",
        (),
        {
            "--data": "annotations/minigpt4.json",
            "--predictions": "predictions.jsonl",
            "--box-format": "bbox_1000",
            "--output": "out",
        },
        ("annotations", "predictions.jsonl"),
        ("out", "out/*"),
        label="--box-format",
    ),
    Call("compare", ("one", "two"), {}, ("one", "two")),
    Call(
        "compare",
        ("one", "two"),
        {
            "--json": True,
            "--protocol": "unc",
            "--worst": "3",
            "--max-accuracy-drop": "0.5",
            "--min-prediction-agreement": "0.1",
            "--min-box-iou": "0.1",
        },
        ("one", "two"),
        label="--json",
    ),
    Call(
        "recommend",
        ("dynamic",),
        {
            "--data": "scenes:3",
            "--limit": "6",
            "--keep": "1.0,0.5",
            "--requests": "1",
            "--max-accuracy-drop": "0.5",
            "--protocol": "unc",
            **_OPENVINO,
            **_ONE,
        },
        ("dynamic",),
        ("dynamic.runs", *_RUNS, "dynamic/reports", "dynamic/reports/*"),
        ("dynamic/reports/*",),
    ),
    Call(
        "recommend",
        ("dynamic",),
        {
            "--data": "annotations/refer",
            "--split": "val",
            "--images": "images",
            "--keep": "1.0,0.5",
            "--requests": "1",
            "--rescale-boxes": True,
            "--ignore-exif": True,
            "--skip-bad-rows": True,
            "--replace": True,
            "--json": True,
            **_PROVIDER,
            **_ONE,
        },
        ("dynamic", "annotations", "images"),
        ("dynamic.runs", *_RUNS, "dynamic/reports", "dynamic/reports/*"),
        ("dynamic/reports/*",),
        label="--data",
    ),
    Call(
        "recommend",
        (),
        {
            "--model": "recipe.yaml",
            "--pruners": "divprune",
            "--keep": "0.25",
            "--data": "scenes",
            "--limit": "2",
            "--requests": "1",
            "--no-plot": True,
            "--output": "chosen",
            **_ONE,
        },
        _BUILD,
        ("chosen", "chosen/*"),
        label="--pruners",
    ),
    Call(
        "recommend",
        (),
        {
            "--model": "recipe.yaml",
            "--pruners": "divprune",
            "--keep": "0.25",
            "--data": "scenes",
            "--limit": "2",
            "--requests": "1",
            "--no-plot": True,
            "--output": "choice",
            "--replace": True,  # it was made of a checkpoint elsewhere
            "--json": True,
            **_ONE,
        },
        (*_BUILD, "choice"),
        ("choice/*",),
        ("choice/*",),
        label="finished",
    ),
    Call(
        "report",
        ("one", "two"),
        {"--output": "page.html", "--no-pruners": True},
        ("one", "two"),
        ("page.html",),
    ),
    Call(
        "report",
        ("one", "two"),
        {
            "--output": "report.html",
            "--protocol": "unc",
            "--images": "images",
            "--worst": "2",
            "--drawn": "2",
            "--max-accuracy-drop": "0.5",
            "--min-prediction-agreement": "0.1",
            "--min-box-iou": "0.1",
            "--no-pruners": True,
        },
        ("one", "two", "images", "report.html"),
        rewrites=("report.html",),
        label="again",
    ),
    Call("inspect", ("bundle",), {}, ("bundle",)),
    Call("inspect", ("bundle",), {"--verify": True, "--json": True}, ("bundle",), label="--json"),
    Call("inspect", ("proven",), {}, ("proven",), label="proven"),
    Call("inspect", ("measured",), {}, ("measured",), label="measured"),
    Call(
        "report",
        ("measured",),
        {"--output": "page.html", "--no-pruners": True},
        ("measured", "measured.runs", "annotations", "images"),
        ("page.html",),
        label="measured",
    ),
    Call("inspect", ("engines",), {}, ("engines",), label="engines"),
    Call("lint", ("bundle/decoder.onnx",), {}, ("bundle",)),
    Call(
        "lint",
        ("bundle/decoder.onnx",),
        {"--prove": True, "--kind": "decoder", "--ids-input": "position_ids", "--json": True},
        ("bundle",),
        label="--prove",
    ),
    Call(
        "serve",
        ("measured",),
        {
            "--host": "localhost",
            "--port": "0",
            "--name": "red",
            "--alias": ("mug", "cup"),
            "--rows": "2",
            "--queue": "3",
            "--deadline": "5",
            "--image-threads": "1",
            "--api-keys": "keys.txt",
            "--protect-metrics": True,
            "--allow-anonymous": True,
            "--allow-domain": "example.org:443",
            "--max-body": "2",
            "--max-image-bytes": "1",
            "--max-pixels": "2.5",
            "--max-side": "2000",
            "--max-connections": "4",
            "--drain-grace": "0.01",
            "--allow-baselines": True,
            "--adapt": "1.0:0.1",
            "--max-accuracy-drop": "0.5",
            "--target-delay": "0.1",
            "--box-format": "list_pixels",
            **_ONE,
        },
        ("measured", "keys.txt"),
    ),
    Call("serve", ("measured",), {"--port": "0", **_OPENVINO, **_ONE}, ("measured",), label="openvino"),
    Call("serve", ("measured",), {"--port": "0", **_PROVIDER, **_ONE}, ("measured",), label="provider"),
    Call("golden", ("bundle",), {"--json": True}, ("bundle",), _GOLDEN, ("bundle/manifest.json",)),
    Call(
        "golden",
        ("proven",),
        {"--replace": True, "--checkpoint": "checkpoint"},
        ("proven", "checkpoint"),
        rewrites=("proven/golden.*", "proven/manifest.json"),
        label="--replace",
    ),
    Call(
        "golden",
        ("worded",),
        {"--text-tower": "tower", "--checkpoint": "checkpoint"},
        ("worded", "checkpoint", "tower"),
        ("worded/golden.*",),
        ("worded/manifest.json",),
        label="--text-tower",
    ),
    Call(
        "check-receipt",
        ("bundle", "receipt.json", "image.png"),
        {"--refer": "the red mug", **_ONE},
        ("bundle", "receipt.json", "image.png"),
    ),
    Call(
        "check-receipt",
        ("bundle", "receipt.json", "image.png"),
        {"--json": True, **_ONE},
        ("bundle", "receipt.json", "image.png"),
        label="--json",
    ),
    Call(
        "check-receipt",
        ("talking", "answered.json", "image.png"),
        {"--messages": "asked.json", **_ONE},
        ("talking", "answered.json", "asked.json", "image.png"),
        label="--messages",
    ),
    Call(
        "lint", ("bundle/vision.onnx",), {"--strict": True, "--kind": "vision"}, ("bundle",), label="vision"
    ),
)

UNUSED = {
    "--ray": "it starts a cluster of processes, which forked children cannot end",
    "--ray-address": "it belongs to --ray",
    "eval --workers": "it belongs to --ray",
    "--max-pixels": "it belongs to families that take images at their own size",
    "--base": "it belongs to checkpoints that are deltas",
    "--vision-tower": "it belongs to checkpoints that are published without one",
}
"""Options that no harmless call has, and why; hostile values they are given all the same."""


def calls_of(parameter: Parameter) -> list[Call]:
    """Calls of a command, those first that have the parameter."""
    calls = [call for call in CALLS if call.command == parameter.command]
    return sorted(calls, key=lambda call: not parameter.is_argument and parameter.flag not in call.options)


def call(name: str) -> Call:
    """By its name."""
    (found,) = (each for each in CALLS if each.name == name)
    return found
