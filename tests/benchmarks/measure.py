"""One figure, in this process: ``python measure.py POOL CELL WORKERS COUNT SIZE``. :mod:`pool` starts these."""

from __future__ import annotations

import sys

import cells
import peers


def main() -> None:
    name, cell, workers, count, size = sys.argv[1:]
    peer = peers.ALL[name](int(workers))
    figures = cells.CELLS[cell](peer, int(count), int(size))
    import json

    print(json.dumps(figures), flush=True)
    peer.close()


if __name__ == "__main__":
    main()
