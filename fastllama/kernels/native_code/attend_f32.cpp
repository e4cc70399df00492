#include "attend_all.h"

template void fastllama::attend_head<float>(int64_t, const float*, float, const fastllama::Run&, const fastllama::Run&, int64_t,
                                         int64_t, const int64_t*, int, const fastllama::Partial&);
