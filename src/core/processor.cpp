module core.processor;
import core.std;

#if __STDC_HOSTED__

namespace fl {

namespace {
thread_local u32 number_of_this = 0;
} // namespace

u32 this_processor() { return number_of_this; }
void set_this_processor(u32 number) { number_of_this = number; }

} // namespace fl

#endif
