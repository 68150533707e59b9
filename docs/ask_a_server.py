"""Asks a server where something is, with nothing but Python: `python ask_a_server.py http://127.0.0.1:8000 photo.jpg "the red mug" [KEY]`."""

import base64
import json
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path


def ground(server: str, image: Path, expression: str, key: str = "") -> list[list[float]]:
    """Boxes [x1, y1, x2, y2] in pixels of the image as displayed; a busy server is asked again when it says."""
    encoded = base64.b64encode(image.read_bytes()).decode()
    body = {"image": f"data:image/any;base64,{encoded}", "expression": expression}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    request = urllib.request.Request(f"{server}/v1/ground", json.dumps(body).encode(), headers)
    while True:
        try:
            with urllib.request.urlopen(request) as response:
                return [box["pixels"] for box in json.load(response)["results"][0]["boxes"]]
        except urllib.error.HTTPError as error:
            if error.code != 503:
                raise SystemExit(json.load(error)["error"]["message"]) from None
            time.sleep(float(error.headers.get("Retry-After", 1)))


if __name__ == "__main__":
    if len(sys.argv) not in (4, 5):
        raise SystemExit("ask_a_server.py SERVER IMAGE EXPRESSION [KEY]")
    print(ground(sys.argv[1].rstrip("/"), Path(sys.argv[2]), *sys.argv[3:]))
