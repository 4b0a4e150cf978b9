#pragma once

#include <string>

namespace abi_host {

void run_lifecycle(const std::string &path);  // prints what it did; throws at the first failure
void run_refusals(const std::string &path);
bool has_gpu();
void run_on_gpu(const std::string &path, const std::string &cases);
void run_threads(const std::string &path, const std::string &golden_case);

}  // namespace abi_host
