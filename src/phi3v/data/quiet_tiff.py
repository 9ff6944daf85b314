"""What libtiff says of a damaged file: written past Python to the C stream stderr, where no logger or redirection is.

PIL raises the same fault as an exception, and the row's problem holds it. So the command line turns libtiff's own
messages off, with libtiff's own switch; redirecting the file descriptor would take away what other threads write
meanwhile. libjpeg and the other decoders write nothing: PIL has turned them off itself.
"""

import ctypes

from PIL import Image

_SWITCHES = ("TIFFSetErrorHandler", "TIFFSetWarningHandler")


def silence_libtiff() -> bool:
    """Turns libtiff's messages off, for this process and for good; what it finds still reaches PIL.

    Returns: False where the libtiff inside PIL does not show its switches, as when it is linked statically: it then
        goes on talking.
    """
    try:
        library = ctypes.CDLL(Image.core.__file__)  # PIL's own module: what it is linked with is found behind it
        switches = [getattr(library, name) for name in _SWITCHES]
    except (AttributeError, OSError):
        return False
    for switch in switches:
        switch.argtypes, switch.restype = [ctypes.c_void_p], ctypes.c_void_p
        switch(None)
    return True
