// All lanes of a warp, as its collective instructions take them.
#pragma once

#include <cstdint>

namespace svdit {

constexpr uint32_t kAllLanes = 0xffffffffu;

}  // namespace svdit
