/* Each serves and calls with a copy of crpc of its own. */
#ifdef __cplusplus
extern "C" {
#endif
int copy_static_a(void);
int copy_static_b(void);
int copy_normal(void);
#ifdef __cplusplus
}
#endif
