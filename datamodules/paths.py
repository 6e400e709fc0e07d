"""Names of shards: expansion of patterns, local or remote, and where copies and indices are kept."""

import glob
import gzip
import hashlib
import os
import shutil
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import fsspec
import webdataset as wds
from webdataset.shardlists import expand_urls

from mmtrain.config_errors import UserError

# WebDataset would otherwise run `pipe:` URLs and unpickle members.
wds.utils.enforce_security = True


def cache_folder() -> Path:
    """$MMTRAIN_CACHE, or mmtrain in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("MMTRAIN_CACHE") or Path(base) / "mmtrain")


def is_remote(url: str) -> bool:
    """True for s3://, gs://, https:// and the like; False for paths and file://."""
    return "://" in url and not url.startswith("file://")


def expand_shards(shards: str | Sequence[str]) -> list[str]:
    """List the shards named by paths, folders, globs, brace ranges ({00000..00331}) and URLs, in name order.

    Raises:
        UserError: nothing matches, a file does not exist, or a `pipe:` URL is given.
    """
    patterns = [shards] if isinstance(shards, str) else list(shards)
    found: list[str] = []
    for pattern in patterns:
        found += _expand_one(str(pattern).removeprefix("file://"))
    if not found:
        raise UserError("no shards were named: give a path, a folder, a glob, a brace range or a URL")
    return sorted(dict.fromkeys(found))


def any_exists(shards: str | Sequence[str]) -> bool:
    """Whether something is there under any of these names or patterns; URLs of object stores count as there."""
    patterns = [shards] if isinstance(shards, str) else shards
    names = [name for p in patterns for name in (expand_urls(str(p)) if "{" in str(p) else [str(p)])]
    return any(is_remote(n) or glob.glob(n.removeprefix("file://")) for n in names)


def _expand_one(pattern: str) -> list[str]:
    if pattern.startswith("pipe:"):
        raise UserError(
            f"{pattern}: shell pipes are not read from; give a path or a URL such as s3://bucket/{{0..9}}.tar"
        )
    if os.path.isdir(pattern):
        names = sorted(n for n in os.listdir(pattern) if n.endswith((".tar", ".tar.gz")))
        if not names:
            raise UserError(f"{pattern}: the folder holds no .tar or .tar.gz shards")
        return [os.path.join(pattern, n) for n in names]
    urls = expand_urls(pattern) if "{" in pattern else [pattern]
    if is_remote(pattern):
        fs, _ = fsspec.core.url_to_fs(urls[0])
        return [fs.unstrip_protocol(m) for u in urls for m in fs.glob(u)] if "*" in pattern else urls
    matches = [m for u in urls for m in (sorted(glob.glob(u)) if any(c in u for c in "*?") else [u])]
    missing = [m for m in matches if not os.path.exists(m)]
    if missing or not matches:
        raise UserError(
            f"{missing[0] if missing else pattern}: no such shard ({len(missing)} of {len(matches)} named are missing)"
        )
    return matches


def unpacked(url: str) -> str:
    """Path of the plain tar behind a local `.tar.gz`, unpacked once into the cache; other names are returned as is.

    Only plain tars can be read at an offset.
    """
    if is_remote(url) or not url.endswith(".gz"):
        return url
    status = os.stat(url)
    tag = hashlib.sha256(f"{os.path.abspath(url)}:{status.st_size}:{status.st_mtime_ns}".encode()).hexdigest()[:12]
    target = cache_folder() / "unpacked" / tag / os.path.basename(url).removesuffix(".gz")
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as plain:
            part = plain.name
        try:
            with gzip.open(url) as packed, open(part, "wb") as plain:
                shutil.copyfileobj(packed, plain)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            os.unlink(part)
            raise UserError(f"{url}: cut, or not a gzip file ({error})") from error
        stats = url.removesuffix(".tar.gz") + "_stats.json"
        if os.path.exists(stats):
            shutil.copy(stats, target.parent)
        os.replace(part, target)
    return str(target)
