"""Takes `docs/images/serve.png`, the page of a server: `python docs/screenshot.py BUNDLE` (needs Chromium; the server stops at the end)."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.browser import Tab  # noqa: E402

IMAGES = ROOT / "docs" / "images"
WINDOW = (1160, 850)
COMMAND = [sys.executable, "-m", "gap_export", "serve", "--port", "0", "--allow-baselines"]


def main(bundle: str, to: Path) -> None:
    """Serve a bundle, find what `scene.txt` says, and write down what is seen.

    Args:
        bundle: its folder.
        to: PNG file.
    """
    with (
        subprocess.Popen([*COMMAND, bundle], stdout=subprocess.PIPE, text=True, cwd=ROOT) as server,
        tempfile.TemporaryDirectory() as profile,
        Tab(Path(profile), WINDOW) as tab,
    ):
        try:
            assert server.stdout is not None
            address = re.search(r"http://\S+", server.stdout.readline())
            assert address is not None, "the server does not start"
            tab.open(f"{address[0]}/")
            tab.until("!document.getElementById('ask').hidden")
            tab.give_file("#file", IMAGES / "scene.png")
            tab.until("document.getElementById('shown').naturalWidth > 0")
            for _ in range(2):  # the second time is what a server takes that has answered before
                tab.run("document.getElementById('text').value = ''; document.getElementById('text').focus()")
                tab.type((IMAGES / "scene.txt").read_text().strip())
                tab.press("Enter")
                tab.until(
                    "document.querySelector('#overlay .box') && !document.getElementById('find').disabled"
                )
            tab.run("document.activeElement.blur()")
            tab.screenshot(to)
        finally:
            server.terminate()


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        raise SystemExit("screenshot.py BUNDLE [PNG]")
    main(sys.argv[1], Path(sys.argv[2]) if len(sys.argv) == 3 else IMAGES / "serve.png")
