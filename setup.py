"""Which packages a wheel holds; all else stands in pyproject.toml."""

import setuptools

# configs/ is of the package where that is installed, and not a second one.
setuptools.setup(
  packages=[*setuptools.find_packages(include=['jaxprog*']), 'jaxprog.configs'],
  package_dir={'jaxprog.configs': 'configs'},
)
