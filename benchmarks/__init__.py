"""Speed, memory and accuracy of dlprop beside what a user would write or install instead: `python -m benchmarks`."""
