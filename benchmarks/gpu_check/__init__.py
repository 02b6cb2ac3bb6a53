"""A GPU's first ten minutes: one command that checks and measures on CUDA whatever could only be written without it.

    python -m benchmarks.gpu_check --out FOLDER [--wheels FOLDER]        # on a machine with a GPU; eight minutes
    python -m benchmarks.gpu_check --device cpu --small                  # the same code, made small: under two minutes

``docs/gpu.md`` says what it measures and how to send the file. The process that is started keeps to the standard
library: whatever else is needed may be missing, and that must be said in the file, not end it. Each part is a process
of its own (`benchmarks.gpu_check.child`), with a time limit and a section of the file.
"""
