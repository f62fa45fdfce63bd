"""Fisher-Rao geometry of distributions, and the root system that gives the kernels their addresses.

simplex   distributions p: distance, exp and log, means, KL     (a point is p >= 0, sum p = 1)
sphere    the same through s = sqrt(p): unit vectors            (a point is |s| = 1)
e8        240 roots of the lattice E8: nearest root, neighbours, roles

likelihood  softmax, Gaussian, Bernoulli outputs: the metric of each
fisher      the Fisher information of parameters, as something one can multiply with
solve       (F + damping) x = g: conjugate gradients, sample space, dense -> Solution
"""
