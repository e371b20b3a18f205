"""Another process on the card: takes memory, holds it, takes more when told to.

    python -m benchmarks.rescue.tenant BYTES

Reads lines: `go` takes the memory, `rest BYTES` takes all but so much of what is free then.
"""

import sys

CHUNK_BYTES = 2**26


def main() -> None:
    import torch

    held = []
    for line in sys.stdin:
        word, _, number = line.strip().partition(" ")
        if word == "go":
            size_bytes = int(sys.argv[1])
            held.append(torch.empty(size_bytes, dtype=torch.uint8, device="cuda"))
        elif word == "rest":
            while torch.cuda.mem_get_info()[0] > int(number) + CHUNK_BYTES:
                try:
                    held.append(torch.empty(CHUNK_BYTES, dtype=torch.uint8, device="cuda"))
                except torch.OutOfMemoryError:  # others took it meanwhile
                    break
        torch.cuda.synchronize()
        print("done", flush=True)


if __name__ == "__main__":
    main()
