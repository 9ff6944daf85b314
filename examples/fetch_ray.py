"""Images behind web addresses, downloaded by all machines of a Ray cluster into one cache.

    pip install "ray[data]"
    python examples/fetch_ray.py addresses.txt /shared/images

`addresses.txt` holds one address a line; the cache folder is one that all machines see. A recipe finds the images there
with `data.image_cache: /shared/images`. Each batch goes through the function that one machine uses, `fetch_images`, so
limits, reasons and the layout of the cache are the same, and a second run asks only for what is missing.
"""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import ray

from phi3v.data.fetch import FetchLimits, fetch_images
from phi3v.data.image_cache import ImageCache


def fetch_batch(batch: dict[str, Any], cache: ImageCache, limits: FetchLimits) -> dict[str, list[str]]:
    """The addresses of a batch that are not in the cache now: a reason for machines and a line for people each."""
    failures = fetch_images([str(url) for url in batch["url"]], cache, limits).failures.values()
    return {"reason": [why.reason_code for why in failures], "message": [why.message for why in failures]}


def main(addresses: Path, folder: Path, limits: FetchLimits | None = None) -> Counter[str]:
    """Downloads all addresses of a file. Returns: how many are cached now, and how many are not for each reason."""
    lines = addresses.read_text(encoding="utf-8").split("\n")
    urls = list(dict.fromkeys(line.strip() for line in lines if line.strip()))  # as `fetch_images` tells them apart
    table = ray.data.from_items([{"url": url} for url in urls])
    arguments = {"cache": ImageCache(folder), "limits": limits or FetchLimits()}
    missing = table.map_batches(fetch_batch, batch_size=256, fn_kwargs=arguments).take_all()
    for row in missing:
        print(f"{row['reason']}: {row['message']}")
    return Counter(cached=len(urls) - len(missing)) + Counter(row["reason"] for row in missing)


if __name__ == "__main__":
    print(main(Path(sys.argv[1]), Path(sys.argv[2]).absolute()))
