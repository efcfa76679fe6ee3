"""Speed, memory and accuracy of dlprop beside what a user would write instead: `python -m benchmarks`."""
