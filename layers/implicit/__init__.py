"""Layers whose output is the solution of an equation, differentiated by the implicit function theorem."""

from layers.implicit.argmin import argmin as argmin
from layers.implicit.deq import DEQ as DEQ
from layers.implicit.failure import ConvergenceError as ConvergenceError
from layers.implicit.fixed_point import fixed_point as fixed_point
from layers.implicit.krylov import CG as CG
from layers.implicit.krylov import GMRES as GMRES
from layers.implicit.linear import Neumann as Neumann
from layers.implicit.linear import OneStep as OneStep
from layers.implicit.minimizers import LBFGS as LBFGS
from layers.implicit.minimizers import NewtonCG as NewtonCG
from layers.implicit.root import root as root
from layers.implicit.rule import Convergence as Convergence
from layers.implicit.solvers import Anderson as Anderson
from layers.implicit.solvers import Broyden as Broyden
from layers.implicit.solvers import Iteration as Iteration
from layers.implicit.solvers import Newton as Newton
