"""Check for a machine with a GPU: one command that tests and measures on CUDA what was written without one.

    python -m benchmarks.gpu_check --out FOLDER [--wheels FOLDER]        # on a machine with a GPU; eight minutes
    python -m benchmarks.gpu_check --device cpu --small                  # small networks: under two minutes

``docs/gpu.md`` says what it measures and how to send the results. The main process imports only the standard library
and light modules: any other package may be missing, which the results must report instead of ending the check. Each
part runs in its own process (`benchmarks.gpu_check.child`), with a time limit and a section of the results.
"""
