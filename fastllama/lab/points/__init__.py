"""What is asked: a point, its workload and sampler, and files of points."""
