// Chooses the instruction set, spreads a call over threads.
#pragma once
#include <string>
#include <vector>

#include "problem.h"

namespace reparam {

std::vector<std::string> available();  // what this CPU can run, best first
const Kernels& kernels();              // the set in use: the best, until use() says otherwise
void use(const std::string& isa);      // throws std::invalid_argument
bool has_openmp();

enum class Op { randn, forward, backward };
void run(Op op, Problem& problem, int threads);

}  // namespace reparam
