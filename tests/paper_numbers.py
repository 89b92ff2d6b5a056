"""The paper's acceptance lengths and modeled multipliers (method.md sections 5 and 6)."""

import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAPER_67M = str(ROOT / "configs/paper_67m.py")
PAPER_70B = str(ROOT / "configs/paper_llama3_70b.py")
TAU = {"vanilla": 2.647, "magicdec": 3.891, "spire": 3.401}

# Method.md section 5: (variant, L): vanilla, MagicDec, SPIRe at B = 64.
TABLE = {
    ("paper", 32): (1.59, 1.00, 1.98),
    ("paper", 512): (1.36, 2.05, 2.78),
    ("paper", 4096): (1.33, 2.50, 2.99),
    ("fixed_window", 32): (1.59, 0.77, 1.69),
    ("fixed_window", 512): (1.36, 2.05, 2.78),
    ("fixed_window", 4096): (1.33, 3.46, 3.30),
    ("per_operator", 32): (1.55, 0.77, 1.66),
    ("per_operator", 512): (1.36, 2.04, 2.76),
    ("per_operator", 4096): (1.33, 3.46, 3.30),
    ("with_head", 32): (1.33, 0.77, 1.27),
    ("with_head", 512): (1.33, 1.91, 2.45),
    ("with_head", 4096): (1.32, 3.39, 3.22),
}
