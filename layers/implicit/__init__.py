"""Layers whose output is the solution of an equation, differentiated by the implicit function theorem."""

from layers.implicit.failure import ConvergenceError
from layers.implicit.krylov import CG, GMRES
from layers.implicit.linear import Neumann, OneStep
from layers.implicit.minimizers import LBFGS, NewtonCG
from layers.implicit.rule import Convergence
from layers.implicit.solvers import Anderson, Broyden, Iteration, Newton

__all__ = ["CG", "GMRES", "LBFGS", "Anderson", "Broyden", "Convergence", "ConvergenceError", "Iteration", "Neumann", "Newton", "NewtonCG", "OneStep"]
