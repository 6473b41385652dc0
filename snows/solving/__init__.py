"""Solvers for a function of one weight: curvature, preconditioners, conjugate gradients, Newton."""
