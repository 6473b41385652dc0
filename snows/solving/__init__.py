"""Solvers for a function of one weight: curvature operators, preconditioners, conjugate gradients, Newton's method."""
