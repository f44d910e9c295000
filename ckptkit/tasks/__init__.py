"""Work that other processes and machines do: independent tasks on an executor, and the inputs that each opens again."""
