#include "parallel.h"

namespace ernie {
namespace {
int threads = 1;
}

int num_threads() { return threads; }
void set_num_threads(int count) { threads = std::max(1, count); }

}  // namespace ernie

extern "C" {
__attribute__((visibility("default"))) int ernie45_num_threads() { return ernie::num_threads(); }
__attribute__((visibility("default"))) void ernie45_set_num_threads(int count) { ernie::set_num_threads(count); }
}
