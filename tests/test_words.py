"""Words: the field's own instead of private ones, modules under their own names, docstrings that say something themselves."""

from __future__ import annotations

from pathlib import Path

import gap_export

PACKAGE = Path(gap_export.__file__).parent
ROOT = PACKAGE.parent

BANNED = {
    # Names
    r"picture": "image",
    r"fewest": "minimum, min_",
    r"(?<!un)usual\b": "typical, default",
    r"hollow": "fake, meta",
    r"contender": "candidate",
    r"\bdemands?\b": "threshold; require",
    r"\bstrateg(y|ies)\b(?! =|\"|_)": "pruner",
    r"\brooms?\b": "package, space, capacity",
    r"\braters?\b": "scoring queries",
    r"\bplanes\b": "deepstack_levels",
    r"\bjudged\b": "checked, under test",
    r"\bdeal(s|t|ing)? (to|out|with their)\b|\bdealt\b": "dispatch",
    r"\bhired?\b": "start",
    r"looks_ahead": "uses_next_layer_attention",
    r"in_steps\b": "sequential",
    r"IN_MATMULS": "DECOMPOSED",
    r"\bknock": "check_reachable",
    r"PATIENCE": "TIMEOUT",
    r"EnvironmentLacks|\bDemands\b|\bPieces\b|\bassembly\b|ModelFacts|TowerPart|tower_lacks": "see the glossary",
    r"\bAsked\b|Answerer|answer_rest": "EvalOptions, Evaluator, continue_answers",
    r"\b(_?refuse|require)_\w+": "check_",
    r"\b(Seen|Shown|Gap)\b": "VisionFeatures, ImageFeatures, Margin",
    r"seen_size": "resized",
    # Phrases
    r"right by definition": "the reference run",
    r"(may|can) be killed|goes? on\b|gone on with": "can be interrupted; rerun the same command to resume; continues",
    r"los(es|e|ing) little enough": "within the accuracy tolerance",
    r"large activations get": "activation ranges (amax)",
    r"telling words": "relevant text tokens",
    r"takes? the ids away": "what breaks position ids",
    r"by a hair\b": "near-tie",
    r"no films": "video is not supported",
    r"\bof ours\b": "name what it is",
    r"\bnobody\b|\beveryone\b": "name who",
    r"takes? turns": "interleaved",
    r"code of its own": "requires remote code",
    r"In words\b": "text",
}
"""What is not written in the package and its documents -> what is."""
