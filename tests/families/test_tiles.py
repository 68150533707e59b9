from __future__ import annotations

import pytest


@pytest.mark.parametrize("name", ["llava_next", "llava_next_mistral", "llava_onevision", "internvl"])
def test_build(tiny_family, name):
    b = tiny_family(name).bundle(keep=0.3)
    print(b.manifest.model, b.manifest.pruning)
