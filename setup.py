"""Package layout only: no torch and no extension here, so installing needs nothing but setuptools.

Only ``rnn_cuda`` is installed. The kernels in ``csrc/`` are compiled on first use by
``rnn_cuda.build``; a plain (not editable) install carries them along as the data-only package
``rnn_cuda._csrc``. The laboratory (``experiments``, ``hydra_conf``) is run from a clone.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["rnn_cuda", "rnn_cuda.*"]), "rnn_cuda._csrc"],
    package_dir={"rnn_cuda._csrc": "csrc"},
    package_data={
        "rnn_cuda": ["py.typed"],
        "rnn_cuda._csrc": ["*.h", "*.cpp", "*/*.h", "*/*.cpp", "*/*.cuh", "*/*.cu"],
    },
)
