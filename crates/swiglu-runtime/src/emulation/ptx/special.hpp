// In place of shared/ptx/special.cuh.
inline float ex2_approx(float value) { return std::exp2(value); }
inline float rcp_approx(float value) { return 1.0f / value; }
inline float tanh_approx(float value) { return std::tanh(value); }
