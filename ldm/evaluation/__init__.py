"""How good a model is: fidelity, distances, the report and the gate."""
