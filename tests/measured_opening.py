"""Opens image files, each in a process of its own, and says what that took: the measure of the tests' limits.

`python measured_opening.py < paths` prints a JSON list of [path, verdict, width, height, seconds, megabytes]. The
seconds are the processor's, for the picture or for its header, whichever took longer. The verdict is "opened",
"refused", "several lines", "size differs", "crash" or "killed" (after 10 s of the processor or a minute of waiting).
"""

import json
import os
import resource
import signal
import sys
import time
from itertools import pairwise

from PIL import Image

from phi3v.data.images import image_size, open_image
from phi3v.errors import ImageError


def memory() -> dict[str, float]:
    """This process's memory now and at its highest, in MB; zeros where the system does not say."""
    try:
        with open("/proc/self/status") as file:
            lines = [line.split() for line in file if line.startswith(("VmRSS:", "VmHWM:"))]
    except OSError:
        lines = []
    return {"VmRSS:": 0.0, "VmHWM:": 0.0, **{name: int(kilobytes) / 1024 for name, kilobytes, _ in lines}}


def measure(path: str) -> list:
    """What opening one file gives and takes."""
    before, size, moments = memory()["VmRSS:"], (0, 0), [time.process_time()]
    try:
        image = open_image(path)
        size = image.size
        moments.append(time.process_time())
        verdict = "opened" if image.mode == "RGB" and image_size(path) == size else "size differs"
    except ImageError as error:
        verdict = "refused" if "\n" not in str(error) else "several lines"
    except BaseException as error:
        verdict = f"crash: {error!r}"
    moments.append(time.process_time())
    longest = max(later - earlier for earlier, later in pairwise(moments))
    return [path, verdict, *size, longest, memory()["VmHWM:"] - before]


def in_a_child(path: str) -> list:
    """`measure` in a fork, which starts from a warm library and may die."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_CPU, (10, 10))
        signal.alarm(60)
        os.write(writing, json.dumps(measure(path)).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return json.loads(answer) if answer else [path, "killed", 0, 0, 10.0, 0.0]


if __name__ == "__main__":
    Image.init()
    print(json.dumps([in_a_child(line) for line in sys.stdin.read().splitlines()]))
