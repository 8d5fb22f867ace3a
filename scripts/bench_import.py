"""Time `import autoplace` beside `import torch`: fresh processes in turn, medians, and the ratio pair by pair."""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

from results import save


def import_ms(module: str) -> float:
    """Return the wall time of one fresh process that imports a module, ms."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
    return (time.perf_counter() - start) * 1e3


def main() -> None:
    """Measure, print a table and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    modules = ("torch", "autoplace", "torch")
    import_ms("autoplace")
    samples = [[import_ms(module) for module in modules] for _ in range(rounds)]
    torch_ms, autoplace_ms, again_ms = zip(*samples, strict=True)
    ratio = statistics.median(a / t for a, t in zip(autoplace_ms, torch_ms, strict=True))
    noise = statistics.median(abs(b / a - 1) for a, b in zip(torch_ms, again_ms, strict=True))
    print(f"import torch      {statistics.median(torch_ms):8.0f} ms")
    print(
        f"import autoplace  {statistics.median(autoplace_ms):8.0f} ms   ratio {ratio:.3f} (target 1.3), A/A {noise:.1%}"
    )
    save(
        "import",
        seed=0,
        data={"torch_ms": torch_ms, "autoplace_ms": autoplace_ms, "ratio": ratio, "aa_noise": noise},
    )


if __name__ == "__main__":
    main()
