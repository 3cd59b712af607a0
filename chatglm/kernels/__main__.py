"""Compile the C kernels now, so that no later start has to: python -m chatglm.kernels.

With CHATGLM_KERNELS_CACHE set to a folder of a container image, now and when it runs, it needs no compiler any more.
"""

import argparse
import sys

from . import cpu


def main(argv=None) -> int:
    """Exit code 0 if the compiled kernels are in the cache folder, else 1 with the reason on stderr."""
    argparse.ArgumentParser(prog="python -m chatglm.kernels", description=__doc__).parse_args(argv)
    try:
        kernels = cpu.load()
    except OSError as error:
        print(f"no C kernels: {error}", file=sys.stderr)
        return 1
    print(f"{kernels.name}   {kernels.path or 'not kept'}   ({kernels.reason})")
    return 0 if kernels.path else 1


if __name__ == "__main__":
    sys.exit(main())
