/* Thrift's definition of the echo. */
namespace c_glib bench

service Echo {
  string call(1: string text)
}
