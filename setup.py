"""Package layout only: no torch and no extension here, so installing needs nothing but setuptools.

The kernels in ``csrc/`` are compiled on first use by ``rnn_cuda.build``. A plain (not editable)
install carries them along as the data-only package ``rnn_cuda._csrc``.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["rnn_cuda*", "experiments*"]),
        "rnn_cuda._csrc",
        "hydra_conf",
    ],
    package_dir={"rnn_cuda._csrc": "csrc"},
    package_data={
        "rnn_cuda": ["py.typed"],
        "experiments": ["*/*.j2"],
        "rnn_cuda._csrc": ["*.h", "*.cpp", "*/*.h", "*/*.cpp", "*/*.cuh", "*/*.cu"],
        "hydra_conf": ["*.yaml", "*/*.yaml"],
    },
)
