"""Methods of models as programs, which are traced once and compiled once for each shape, whoever calls them."""

import functools

import jax


@functools.cache
def program(model, method, **how):
    """The jitted `method` of a model, by name or a function of the module: of parameters and arrays. how: what it is
    told besides."""
    return jax.jit(lambda params, *args: model.apply({"params": params}, *args, method=method, **how))


def apply(model, params, method, *args, **how):
    """`model.apply` of parameters, as `program`."""
    return program(model, method, **how)(params, *args)
