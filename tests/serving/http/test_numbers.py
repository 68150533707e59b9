"""Numbers of requests and answers."""

from __future__ import annotations

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from gap_export.serving.http.numbers import new_number


def test_no_number_is_given_twice() -> None:
    with ThreadPoolExecutor(4) as pool:
        numbers = [
            number
            for part in pool.map(lambda _: [new_number() for _ in range(500)], range(4))
            for number in part
        ]
    assert len(set(numbers)) == 2000
    assert all(re.fullmatch(r"[0-9a-f]{32}", number) for number in numbers)


def test_another_process_gives_others() -> None:
    program = "from gap_export.serving.http.numbers import new_number; print(new_number())"
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert other.stdout.strip()[:20] != new_number()[:20]
