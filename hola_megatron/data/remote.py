"""Datasets at a URL: the index is read from there at every start, shards are downloaded into a cache once.

The remote index counts. A cache folder belongs to one preparation of one dataset: its name holds a hash of the
URL and the fingerprint. A dataset that is prepared again under its URL gets a new cache folder, so that shards of two
preparations never lie together, whatever processes start when. A shard that is downloaded must have the hash that the
index read at the start says.
"""

from __future__ import annotations

import hashlib
import os
import random
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hola_megatron.data.mds import import_streaming
from hola_megatron.errors import DataError, FolderInUseError
from hola_megatron.files.ownership import LockFiles, owned

DOWNLOAD_ATTEMPTS = 5
DOWNLOAD_TIMEOUT_S = 300.0
FIRST_DELAY_S = 1.0
LOCK_TIMEOUT_S = 3600.0
FINGERPRINT_DIGITS = 12


class Remote:
    """One remote dataset and its folder under the cache.

    Args:
        url: s3://, gs://, ... whatever streaming downloads; file:// too.
        cache: local folder under which every preparation of every dataset gets a subfolder.

    Attributes:
        folder: where the files lie locally, once `use` has been called.
    """

    def __init__(self, url: str, cache: str | None):
        if cache is None:
            raise DataError(f"{url}: a remote dataset needs a local cache folder; give one (data.cache, --cache)")
        # streaming knows a local "remote" as a path without scheme.
        local = url.startswith("file://")
        self.url = os.path.abspath(url.removeprefix("file://")) if local else url.rstrip("/")
        tag = hashlib.sha256(self.url.encode()).hexdigest()[:12]
        self._cache, self._prefix = Path(cache), f"{self.url.rpartition('/')[2]}-{tag}"
        self.folder = self._cache / self._prefix
        self._downloader: Any = None

    def read(self, name: str, problem_of: Callable[[Path], str | None]) -> bytes:
        """The bytes that a file has at the URL now.

        Args:
            problem_of: returns the problem of a downloaded file, or None; a file with a problem is downloaded again.

        Raises:
            DataError: not there, or still failing after DOWNLOAD_ATTEMPTS.
        """
        with tempfile.TemporaryDirectory(prefix="hola-index-") as folder:
            target = Path(folder) / name
            self._download(name, target, problem_of)
            return target.read_bytes()

    def peek(self, name: str) -> bytes | None:
        """As `read`, in one attempt; None where that fails."""
        with tempfile.TemporaryDirectory(prefix="hola-index-") as folder:
            try:
                self._get(name, Path(folder) / name)
                return (Path(folder) / name).read_bytes()
            except Exception:  # each storage's client has errors of its own
                return None

    def use(self, fingerprint: str, files: dict[str, bytes]) -> None:
        """Choose the cache folder of the preparation with this fingerprint, and keep its `files` there."""
        self.folder = self._cache / f"{self._prefix}-{fingerprint[:FINGERPRINT_DIGITS]}"
        for name, data in files.items():
            target = self.folder / name
            try:
                if target.is_file() and target.read_bytes() == data:
                    continue
                self.folder.mkdir(parents=True, exist_ok=True)
                partial = target.with_name(f".{name}.{uuid.uuid4().hex}.part")
                partial.write_bytes(data)
                os.replace(partial, target)
            except OSError as error:
                raise self._not_writable(error) from error

    def superseded(self) -> list[Path]:
        """Cache folders of other preparations under this URL."""
        if not self._cache.is_dir():
            return []
        return sorted(path for path in self._cache.iterdir()
                      if path.is_dir() and path != self.folder
                      and (path.name == self._prefix or path.name.startswith(f"{self._prefix}-")))

    def fetch(self, name: str, problem_of: Callable[[Path], str | None], changed: Callable[[], str | None]) -> None:
        """Have `name` in the folder; a file that is there is left as it is.

        Args:
            problem_of: as in `read`.
            changed: called when a download fails finally; returns what is at the URL now, if that is another
                preparation, or None.

        Raises:
            DataError: not there, of another preparation, or still failing after DOWNLOAD_ATTEMPTS.
        """
        target = self.folder / name
        if target.is_file():
            return
        try:
            locks = self.folder / ".locks"
            locks.mkdir(parents=True, exist_ok=True)
            target.parent.mkdir(exist_ok=True)  # of a part
            flat = name.replace("/", ".")
            locks_of_file = LockFiles(target, locks / flat, locks / f"{flat}.lease", "stop it, or give another cache")
            # two at once, after one was cut off for a while, do no harm: a download takes its name when it is whole
            with owned(locks_of_file, patience_seconds=LOCK_TIMEOUT_S, on_lost=lambda message: None):
                if not target.is_file():
                    self._download(name, target, problem_of, changed)
        except FolderInUseError as error:
            raise DataError(f"{self.url}/{name}: the process that began to download it has not ended after "
                            f"{LOCK_TIMEOUT_S:.0f} s; {error}") from error
        except OSError as error:
            raise self._not_writable(error) from error

    def _not_writable(self, error: OSError) -> DataError:
        return DataError(f"{self.folder}: the cache cannot be written ({error}); give another cache")

    def _download(self, name: str, target: Path, problem_of: Callable[[Path], str | None],
                  changed: Callable[[], str | None] = lambda: None) -> None:
        failure = ""
        for left in target.parent.glob(f".{target.name}.*.part*"):  # of a process that was killed: the lock is ours
            left.unlink(missing_ok=True)
        for attempt in range(DOWNLOAD_ATTEMPTS):
            if attempt:
                time.sleep(FIRST_DELAY_S * 2 ** (attempt - 1) * random.uniform(1, 1.5))
            partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
            try:
                self._get(name, partial)
                failure = problem_of(partial) or ""
                if not failure:
                    os.replace(partial, target)
                    return
            except FileNotFoundError as error:
                self._refuse_changed(changed)
                raise DataError(f"{self.url}/{name}: no such file; check the path, or prepare the dataset again"
                                ) from error
            except DataError:
                raise
            except Exception as error:
                failure = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            finally:
                for leftover in (partial, partial.with_name(partial.name + ".tmp")):
                    leftover.unlink(missing_ok=True)
            self._refuse_changed(changed)
        raise DataError(
            f"{self.url}/{name}: download failed {DOWNLOAD_ATTEMPTS} times, last: {failure}; check the path, the"
            " credentials and the network"
        )

    def _refuse_changed(self, changed: Callable[[], str | None]) -> None:
        now = changed()
        if now:
            raise DataError(
                f"{self.url}: {now} since this process read its index; put the earlier dataset back and start the same"
                " command again, or start a new run with the new one"
            )

    def _get(self, name: str, partial: Path) -> None:
        try:
            if self._downloader is None:
                self._downloader = self._make_downloader()
            self._downloader.download(f"{self.url}/{name}", str(partial), DOWNLOAD_TIMEOUT_S)
        except ImportError as error:
            scheme = self.url.partition("://")[0]
            raise DataError(f"{self.url}: {scheme}:// needs the package {error.name}: pip install it") from error

    def _make_downloader(self) -> Any:
        import_streaming()
        from streaming.base.storage.download import CloudDownloader

        try:
            return CloudDownloader.get(self.url)
        except ValueError as error:
            raise DataError(
                f"{self.url}: unknown kind of path; allowed are a folder, file://, s3://, gs:// and the others of"
                " mosaicml-streaming"
            ) from error
