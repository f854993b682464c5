"""How good a model is: its bound, metrics, and the gate between it and the champion. `README.md` explains each number."""
