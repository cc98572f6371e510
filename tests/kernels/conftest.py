import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from interpreted import assert_passed, patch_language_once, start_interpreted

sys.path.insert(0, str(Path(__file__).parent))
if os.environ.get("TRITON_INTERPRET") == "1":
    patch_language_once()


@pytest.fixture(scope="session")
def interpreted(request: pytest.FixtureRequest) -> Iterator[Callable[[str], None]]:
    """interpreted(__file__): the file's tests pass where Triton interprets; this session's files run side by side."""
    pytest.importorskip("triton")
    files = {item.path for item in request.session.items if "interpreted" in item.fixturenames}
    pool = ThreadPoolExecutor(os.cpu_count())
    running = {path: pool.submit(start_interpreted, path) for path in sorted(files)}
    yield lambda file: assert_passed(running[Path(file)].result())
    pool.shutdown(cancel_futures=True)
